"""The architectures, as students and as teachers, each a Scorer with gradients."""
