"""What finished runs achieved and cost, what is inside a mixture, and what a run would cost."""
