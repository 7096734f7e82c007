"""What layer-wise relevance propagation is made of: rules, the layers and families they name."""
