"""DeepSeek-V2, DeepSeek-V3 and Kimi K2: multi-head latent attention, and experts."""
