"""What runs on the device against what was trained: llama.cpp, the parity ladder, `validate`, `bundle`."""
