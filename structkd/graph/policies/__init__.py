"""What is switched on beside a method by one flag: objectives, targets, weights, which nodes are asked about."""
