"""Recipes, and the stages that do what they say."""
