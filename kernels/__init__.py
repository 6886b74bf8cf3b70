"""Triton kernels of the LSTM: gate product, recurrent forward and backward, launch."""
