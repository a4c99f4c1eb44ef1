"""What the stages share: set-up, batches, losses, the loop, the folder of a run."""
