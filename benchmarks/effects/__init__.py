"""How close approximated effects come to those of patching."""
