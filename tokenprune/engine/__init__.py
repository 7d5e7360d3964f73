"""What makes a model follow a recipe: the only folder that hooks into one."""
