"""Images and prompts that the stages train on."""
