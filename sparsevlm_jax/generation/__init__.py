"""From a model and questions to answers: the compiled loop, one batch's run, and what users call."""
