"""What pictures share: the house's colours and text."""
