"""What the order service does while its customer's key is taken away, cut off, and rotated."""

from __future__ import annotations

import threading

from fastapi.testclient import TestClient

from keylake.testing import CustomerKey, LocalCluster, ProtectedProject, assert_sealed


def put(shop: TestClient, order_id: str) -> int:
    answer = shop.put(f"/orders/{order_id}", json={"item": "coffee"})
    return int(answer.status_code)


def test_orders_stop_and_come_back_with_the_key(
    shop: TestClient, keylake_project: ProtectedProject, customer_key: CustomerKey
) -> None:
    assert put(shop, "1") == 204

    customer_key.disable()
    sealed = assert_sealed(keylake_project, within=5)
    assert sealed.state == "REVOKED"

    answer = shop.get("/orders")
    assert answer.status_code == 503
    assert answer.json()["error"] == "sealed", "a caller is told that trying again is of no use"
    assert put(shop, "2") == 503

    customer_key.enable()
    keylake_project.wait_until_active(within=5)
    assert shop.get("/orders").json() == ["1"], "without a restart of the service, and nothing is lost"
    assert put(shop, "2") == 204


def test_a_short_outage_of_the_kms_is_not_felt(keylake_cluster: LocalCluster) -> None:
    from app import Base, create_app

    project = keylake_cluster.create_project("patient", outage_grace_s=60)
    app = create_app(project.dsn)
    Base.metadata.create_all(app.state.engine)
    with TestClient(app) as shop, project.key.outage():
        project.revalidate()  # Keylake has noticed
        assert [put(shop, str(number)) for number in range(10)] == [204] * 10
        assert project.state == "ACTIVE"
    app.state.engine.dispose()


def test_a_long_outage_of_the_kms_closes_the_shop_until_it_ends(keylake_cluster: LocalCluster) -> None:
    from app import Base, create_app

    project = keylake_cluster.create_project("impatient", outage_grace_s=0.5)
    app = create_app(project.dsn)
    Base.metadata.create_all(app.state.engine)
    with TestClient(app) as shop:
        assert put(shop, "1") == 204
        with project.key.outage():
            assert assert_sealed(project, within=10).state == "SUSPENDED"
            answer = shop.get("/orders")
            assert answer.status_code == 503
            assert answer.json() == {"error": "unavailable", "sqlstate": "KL002"}, "a caller is told to try again"
            assert "Retry-After" in answer.headers
        project.wait_until_active(within=10)
        assert put(shop, "2") == 204
        assert shop.get("/orders").json() == ["1", "2"]
    app.state.engine.dispose()


def test_rotation_under_load_loses_no_request(
    shop: TestClient, keylake_project: ProtectedProject, customer_key: CustomerKey
) -> None:
    """The customer's key first, and all that Keylake has under it; then Keylake's own."""
    answers: list[int] = []
    rotated = threading.Event()

    def load() -> None:
        after = 0  # enough that are written under the new KEK
        while after < 20:
            answers.append(put(shop, str(len(answers))))
            after += rotated.is_set()

    [kek] = keylake_project.keks
    customers = threading.Thread(target=load)
    customers.start()
    try:
        material = customer_key.rotate()
        keylake_project.rewrap()
        [rewrapped] = keylake_project.keks
        keylake_project.rotate_kek()
        old, new = keylake_project.keks
    finally:
        rotated.set()
        customers.join()
    assert material not in kek.cmk_key_version
    assert material in rewrapped.cmk_key_version
    assert (old.kek_version, new.kek_version) == (1, 2)
    assert material in new.cmk_key_version
    assert set(answers) == {204}
    keylake_project.kill_compute()  # the next one opens everything from storage, under both KEKs
    orders = [shop.get("/orders"), shop.get("/orders")][-1]
    assert len(orders.json()) == len(answers)


def test_a_crash_of_the_compute_costs_one_retry_at_most(shop: TestClient, keylake_project: ProtectedProject) -> None:
    assert put(shop, "1") == 204
    keylake_project.kill_compute()
    answers = [put(shop, "2"), put(shop, "2")]
    assert answers[-1] == 204, "a PUT may be repeated: the client names the order"
    assert shop.get("/orders").json() == ["1", "2"]
