"""How the embedded demo model was made: scenes, questions, objective, training, export. Not part of the wheel."""
