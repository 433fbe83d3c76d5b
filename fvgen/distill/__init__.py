"""Distillation of the teacher into a few-step student: losses, classifier and methods. No loop, no optimisers, no files."""
