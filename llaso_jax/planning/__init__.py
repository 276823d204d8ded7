"""What a recipe needs of devices, worked out before they or its weights are there."""
