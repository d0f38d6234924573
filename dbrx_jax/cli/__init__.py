"""The command dbrx-jax: generate, chat, serve, plan and info."""
