"""From a model to a TensorDictModule that also explains it: what all attribution methods share."""
