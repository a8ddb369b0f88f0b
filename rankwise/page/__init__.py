"""What people look at: plots, the one-screen summary of `rankwise ranks`, and the report page of a run folder."""
