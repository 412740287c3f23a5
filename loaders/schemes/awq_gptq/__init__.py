"""What config.json of AutoAWQ, GPTQ and AutoRound says; `config` is the way in."""
