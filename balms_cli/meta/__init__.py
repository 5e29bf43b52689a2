"""The paper's meta-learning, on one number an example: its influence on the meta loss."""
