"""Distillation of the teacher into a few-step student: losses, classifier, methods, and the trainer that runs them."""
