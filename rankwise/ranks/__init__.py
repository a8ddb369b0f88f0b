"""Weight deltas → spectra → a rank for every matrix, and adapters cut from them: `ranks`, `extract`, `compress`."""
