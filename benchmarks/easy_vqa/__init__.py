"""A public set of questions that nobody here made, answered whole: easy-vqa's test split."""
