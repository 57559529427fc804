"""What routing does, in `/metrics`: counted by the scheduler, shown by the front ends."""
