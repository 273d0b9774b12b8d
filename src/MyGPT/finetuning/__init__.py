"""Fine-tuning: a pretrained model is trained further for one task, such as classifying texts."""
