"""How faithful explanations of trained models are, with a reference and without, beside other methods."""
