"""The stages of training, each a file: align (captions), finetune (stories), mapper (the mapper by itself)."""
