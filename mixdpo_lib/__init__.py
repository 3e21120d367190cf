"""Mix-DPO and MoE-DPO: preference optimisation with a latent expert."""
