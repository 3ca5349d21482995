"""Who is next, with any mix of tiers, tenants and deadlines."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.scheduling.order import ACTIVE_S, Entry, Order, RecentTenants

WEIGHTS = {"priority": 8.0, "default": 4.0, "flex": 1.0}


def entry(tier="default", tenant="a", tokens=100, deadline=0.0, **values) -> Entry:
    return Entry(tier=tier, tenant=tenant, tokens=tokens, deadline=deadline, **values)


def line(*entries: Entry) -> Order:
    order = Order(WEIGHTS)
    for one in entries:
        order.add(one)
    return order


def serve(order: Order, count: int) -> list[Entry]:
    served = []
    for _ in range(count):
        one = order.first()
        order.remove(one)
        order.serve(one.tier, one.tenant, one.tokens)
        served.append(one)
    return served


def test_the_earliest_deadline_of_one_tenant():
    late, early = entry(deadline=2.0), entry(deadline=1.0)
    assert serve(line(late, early), 2) == [early, late]


def test_alike_deadlines_in_order_of_arrival():
    entries = [entry() for _ in range(5)]
    assert serve(line(*entries), 5) == entries


def test_the_tenant_with_less_served():
    order = line(*(entry(tenant="flood") for _ in range(10)))
    serve(order, 5)
    small = entry(tenant="small", deadline=99.0)
    order.add(small)
    assert order.first() is small


def test_nobody_saves_up_a_right():
    order = line(*(entry(tenant="busy") for _ in range(100)))
    serve(order, 50)
    for _ in range(50):
        order.add(entry(tenant="late", deadline=9.0))
    assert Counter(one.tenant for one in serve(order, 20)) == {"late": 10, "busy": 10}


def test_who_is_new_has_no_right_over_who_was_there_for_long():
    order = Order(WEIGHTS)
    for _ in range(50):  # one at a time, so that nobody waits in between
        order.add(entry(tenant="steady"))
        serve(order, 1)
    for _ in range(20):
        order.add(entry(tenant="flood"))
    order.add(entry(tenant="steady"))
    assert [one.tenant for one in serve(order, 2)].count("steady") == 1


def test_a_new_tier_has_no_right_over_one_that_was_there_for_long():
    order = Order(WEIGHTS)
    for _ in range(50):
        order.add(entry())
        serve(order, 1)
    for _ in range(20):
        order.add(entry(tier="flex"))
    order.add(entry())
    assert entry().tier in {one.tier for one in serve(order, 2)}


def test_tiers_share_by_weight_and_none_starves():
    order = line(*(entry(tier=tier) for tier in WEIGHTS for _ in range(200)))
    served = Counter(one.tier for one in serve(order, 130))
    assert served["priority"] > served["default"] > served["flex"] >= 9


def test_a_tier_that_was_empty_saves_up_nothing():
    order = line(*(entry(tier="flex") for _ in range(100)))
    serve(order, 50)
    for _ in range(100):
        order.add(entry(tier="priority"))
    assert Counter(one.tier for one in serve(order, 18))["flex"] == 2


def test_what_streams_already_goes_first():
    urgent = entry(tier="flex", urgent=True)
    assert line(entry(tier="priority"), urgent).first() is urgent


def test_ahead_of_one_tenant_is_all_of_its_own():
    order = line(entry(), entry(), entry(tier="flex", tokens=800))
    ahead = order.ahead("default", "a", 100)
    assert (ahead.requests, ahead.tokens) == (2, 200 + 75)  # and flex's quarter of these three turns
    ahead = order.ahead("default", "new", 100)
    assert (ahead.requests, ahead.tokens) == (1, 100 + 50)  # one turn each, and flex's quarter


def test_tokens_weigh_in_the_count_of_what_is_ahead():
    order = line(*(entry(tenant="flood", tokens=1000) for _ in range(50)))
    assert order.ahead("default", "small", 10).tokens == 10
    assert order.ahead("default", "flood", 10).tokens == 50_000


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.sampled_from(sorted(WEIGHTS)),
            st.sampled_from("abc"),
            st.integers(1, 999),
            st.floats(0, 9),
            st.booleans(),
        ),
        st.tuples(st.just("serve")),
        st.tuples(st.just("leave"), st.integers(0, 99)),
    ),
    max_size=80,
)


@given(steps)
def test_counts_are_exact_and_everybody_is_served(story):
    order, here = Order(WEIGHTS), []
    for step, *given_ in story:
        if step == "add":
            tier, tenant, tokens, deadline, urgent = given_
            here.append(entry(tier, tenant, tokens, deadline, urgent=urgent))
            order.add(here[-1])
        elif step == "serve" and here:
            one = serve(order, 1)[0]
            assert one.urgent or not any(other.urgent for other in here)
            here.remove(one)
        elif step == "leave" and here:
            one = here.pop(given_[0] % len(here))
            order.remove(one)
            order.remove(one)
        assert len(order) == len(here)
        assert order.tokens == sum(one.tokens for one in here)
        assert set(map(id, order.everybody())) == set(map(id, here))
    assert {id(one) for one in serve(order, len(here))} == set(map(id, here))
    assert order.first() is None


def test_how_many_of_a_tenant_wait():
    order = line(entry(), entry(), entry(tenant="b"), entry(tier="flex"))
    assert [order.waits("default", tenant) for tenant in "abc"] == [2, 1, 0]
    serve(order, 1)
    assert order.waits("default", "a") + order.waits("default", "b") == 2


# ---- who was served of late ------------------------------------------------------------------------------------


def test_only_others_count_and_only_for_a_while():
    recent = RecentTenants()
    recent.served("flood", 0.0)
    assert not recent.has_other("flood", 0.0)
    assert recent.has_other("single", 0.0)
    recent.served("single", 1.0)
    assert recent.has_other("flood", 1.0 + ACTIVE_S * 0.99)
    assert not recent.has_other("flood", 1.0 + ACTIVE_S)


def test_who_comes_again_is_young_again():
    recent = RecentTenants()
    recent.served("a", 0.0)
    recent.served("b", ACTIVE_S * 0.9)
    recent.served("a", ACTIVE_S * 0.95)
    recent.served("c", ACTIVE_S * 1.5)
    assert recent.has_other("c", ACTIVE_S * 1.5)


def test_recent_tenants_are_bounded():
    recent = RecentTenants()
    for number in range(RecentTenants.MOST + 5):
        recent.served(str(number), 0.0)
    assert len(recent._served_at) == RecentTenants.MOST
    recent.served("new", ACTIVE_S)
    assert list(recent._served_at) == ["new"]
