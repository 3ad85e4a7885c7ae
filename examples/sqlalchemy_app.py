"""SQLAlchemy: four processes store orders through the ORM over three connections.

    $ python examples/sqlalchemy_app.py

DATABASE_URL must name the database, such as postgresql://user:password@localhost:5432/app.

Prints how many orders were stored, by how many processes, and the most connections that the server
had meanwhile, beside the limit. Creates a table `sharedpool_example_orders`, and drops it at the
end.
"""

import multiprocessing
import os

from sqlalchemy import create_engine, func, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import sharedpool
from sharedpool.integrations.sqlalchemy import SharedPool

LIMIT, PROCESSES, ORDERS = 3, 4, 50

# At import, in every process: configuring a pool connects to nothing. The pool knows where to
# connect, so the URL of the engine does not say it.
pool = sharedpool.config_pool(
    max_conn=LIMIT,
    name="sqlalchemy example",
    pool_manager=sharedpool.ThreadedConnectionPool,
    timeout=30,
)
engine = create_engine("postgresql+psycopg2://", creator=pool.connect, poolclass=SharedPool)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "sharedpool_example_orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    process: Mapped[int]
    connections: Mapped[int]  # of the pool, on the server, when the order was stored


def store_orders() -> None:
    counting = text(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name LIKE 'sharedpool sqlalchemy example [%'"
    )
    for _ in range(ORDERS):
        with Session(engine) as session:
            session.add(Order(process=os.getpid(), connections=session.scalars(counting).one()))
            session.commit()


def main() -> None:
    Base.metadata.drop_all(engine)  # an interrupted run has left its table
    Base.metadata.create_all(engine)
    processes = [multiprocessing.Process(target=store_orders) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    with Session(engine) as session:
        seen = select(
            func.count(), func.count(Order.process.distinct()), func.max(Order.connections)
        )
        orders, workers, connections = session.execute(seen).one()
    print(f"{orders} orders stored by {workers} processes")
    print(f"most connections at a time: {connections}, limit: {LIMIT}")
    Base.metadata.drop_all(engine)


if __name__ == "__main__":
    main()
