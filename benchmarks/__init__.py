"""Benchmarks behind `tritlstm bench`."""
