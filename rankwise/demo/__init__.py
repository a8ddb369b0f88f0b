"""The whole flow offline: drawn worlds, a tiny model of them, `demo` and `tiny`."""
