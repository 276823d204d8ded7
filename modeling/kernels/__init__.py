"""Kernels: one package per operation, with a plain reference beside every fast form."""
