"""The converter between PyTorch safetensors and Orbax, imported as dbrx_convert."""
