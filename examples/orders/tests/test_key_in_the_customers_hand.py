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


def test_rotation_under_load_loses_no_request(shop: TestClient, customer_key: CustomerKey) -> None:
    answers: list[int] = []
    rotated = threading.Event()

    def load() -> None:
        while not rotated.is_set() or len(answers) < 50:
            answers.append(put(shop, str(len(answers))))

    customers = threading.Thread(target=load)
    customers.start()
    try:
        before = customer_key.rotate()
        after = customer_key.rotate()
    finally:
        rotated.set()
        customers.join()
    assert before != after
    assert set(answers) == {204}
    assert len(shop.get("/orders").json()) == len(answers)


def test_a_crash_of_the_compute_costs_one_retry_at_most(shop: TestClient, keylake_project: ProtectedProject) -> None:
    assert put(shop, "1") == 204
    keylake_project.kill_compute()
    answers = [put(shop, "2"), put(shop, "2")]
    assert answers[-1] == 204, "a PUT may be repeated: the client names the order"
    assert shop.get("/orders").json() == ["1", "2"]
