"""Meshes, logical-axis rules and sharding reports. Knows axis names only, never a model."""
