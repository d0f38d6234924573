"""The command dbrx-jax: generate, chat, plan and info."""
