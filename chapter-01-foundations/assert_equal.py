"""One line of output for each claim "what is written out here equals the library's version"."""


def check_equal(claim, ours, library, tolerance=1e-6):
    """Print the largest difference between two tensors and insist that it is at most tolerance."""
    difference = (ours - library).abs().max().item()
    print(f"    {claim:<70} largest difference {difference:.1e}")
    # Written as "not <=" because nan compares false with everything: a nan must fail too.
    assert not difference > tolerance and difference == difference, (
        f"{claim}: {difference} > {tolerance}\nours\n{ours}\nlibrary\n{library}")
