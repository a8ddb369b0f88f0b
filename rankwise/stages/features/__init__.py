"""The stages of `rankwise features …`: capture, train, compare, show, downstream."""
