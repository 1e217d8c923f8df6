"""What several test layers share: real brokers, fake endpoints, small cores."""
