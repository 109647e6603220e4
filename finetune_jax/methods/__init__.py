"""What an update minimises: the task's loss, or something around it."""
