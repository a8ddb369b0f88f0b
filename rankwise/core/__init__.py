"""Mathematics on tensors: sites, spectra, plans, factors. Imports torch and nothing else."""
