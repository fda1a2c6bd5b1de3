"""How the demo model is made: the generator of its questions, and the training."""
