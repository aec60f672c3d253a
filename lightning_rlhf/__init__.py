"""InstructGPT's three stages as PyTorch Lightning modules."""
