"""A small web shop's order service: FastAPI and SQLAlchemy on Postgres, nothing in it knows of Keylake.

    DATABASE_URL=postgresql://… uvicorn app:create_app --factory

What makes it behave when its customer takes the key away is what makes any service behave when its database is away:
connections are checked before use, a lost one is an answer (503) and not a crash, a COMMIT whose outcome is unknown is
told as unknown, and requests can be repeated because the client names the order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from sqlalchemy import String, create_engine, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

SEALED = ("KL003", "KL004")
"""SQLSTATEs: the customer's key is revoked, the project is shredded. Trying again is of no use."""


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    order_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    item: Mapped[str] = mapped_column(String(100))


class OrderBody(BaseModel):
    item: str = Field(min_length=1, max_length=100)


def make_engine(url: str) -> Engine:
    """`pool_pre_ping`: a connection that died in the pool is replaced before a request sees it."""
    return create_engine(make_url(url).set(drivername="postgresql+psycopg"), pool_pre_ping=True, pool_size=4)


def session(request: Request) -> Iterator[Session]:
    with Session(request.app.state.engine) as opened:
        yield opened


Database = Annotated[Session, Depends(session)]
routes = APIRouter()


@routes.put("/orders/{order_id}", status_code=204)
def put_order(order_id: str, body: OrderBody, database: Database) -> None:
    """Answered only when the order is durable. The same PUT again changes nothing."""
    order = insert(Order).values(order_id=order_id, item=body.item)
    database.execute(order.on_conflict_do_nothing())
    database.commit()


@routes.get("/orders")
def list_orders(database: Database) -> list[str]:
    return list(database.scalars(select(Order.order_id).order_by(Order.order_id)))


def database_error(request: Request, error: Exception) -> JSONResponse:
    """503 with a reason that a caller can act on. The driver's own text stays here: it may hold data."""
    sqlstate = sqlstate_of(error)
    if sqlstate in SEALED:
        return JSONResponse({"error": "sealed", "sqlstate": sqlstate}, 503)
    # A PUT may have been committed: the same PUT again settles it.
    word = "unavailable" if request.method == "GET" else "unknown_outcome"
    return JSONResponse({"error": word, "sqlstate": sqlstate}, 503, {"Retry-After": "1"})


def create_app(url: str | None = None) -> FastAPI:
    app = FastAPI()
    app.state.engine = make_engine(url or os.environ["DATABASE_URL"])
    app.add_exception_handler(DBAPIError, database_error)
    app.include_router(routes)
    return app


def sqlstate_of(error: Exception) -> str | None:
    """Of the server's answer; None when there was none.

    libpq does not hand over the SQLSTATE of a connection that was refused, so Keylake says it in the text, too.
    """
    original = error.orig if isinstance(error, DBAPIError) else None
    found: str | None = getattr(original, "sqlstate", None)
    if found is None and (told := re.search(r"SQLSTATE (KL\d{3})", str(original))):
        found = told[1]
    return found
