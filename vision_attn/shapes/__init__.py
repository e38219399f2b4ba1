"""The embedded model `shapes-flux`: its scenes, detector, architecture, training and evaluation."""
