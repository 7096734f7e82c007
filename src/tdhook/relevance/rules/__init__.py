"""The rules of layer-wise relevance propagation, each from its definition."""
