"""The C library: header, cffi shim and its builder."""
