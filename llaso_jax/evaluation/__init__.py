"""LLaSO-Eval: predictions in, scores of both protocols with their uncertainty out."""
