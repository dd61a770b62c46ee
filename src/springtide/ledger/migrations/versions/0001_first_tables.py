"""Tenants, keys, usage with its attempts, and refused records."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "tenants",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("weight", sa.Double, nullable=False),
        sa.Column("privacy", sa.Text, nullable=False),
        sa.Column("created", moment, nullable=False),
        sa.Column("changed", moment, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
        sa.UniqueConstraint("name", name="uq_tenants_name"),
        sa.CheckConstraint("weight > 0", name="ck_tenants_weight_positive"),
        sa.CheckConstraint("privacy IN ('trusted', 'any')", name="ck_tenants_privacy_known"),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("hint", sa.Text, nullable=False),
        sa.Column("created", moment, nullable=False),
        sa.Column("revoked", moment),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("hash", name="uq_api_keys_hash"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_api_keys_tenant_id"),
    )
    op.create_index("ix_api_keys_tenant_id", "api_keys", ["tenant_id"])
    op.create_table(
        "usage",
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("gateway", sa.Text, nullable=False),
        sa.Column("created", moment, nullable=False),
        sa.Column("finished", moment, nullable=False),
        sa.Column("first_token_s", sa.Double),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("recorded", moment, nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage"),
    )
    op.create_index("ix_usage_tenant_id_created", "usage", ["tenant_id", "created"])
    op.create_index("ix_usage_created", "usage", ["created"])
    op.create_table(
        "attempts",
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("replica", sa.Text, nullable=False),
        sa.Column("started", moment, nullable=False),
        sa.Column("ended", moment, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("request_id", "number", name="pk_attempts"),
        sa.ForeignKeyConstraint(
            ["request_id"], ["usage.request_id"], name="fk_attempts_request_id", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_attempts_node_started", "attempts", ["node", "started"])
    op.create_table(
        "refused_usage",
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("received", moment, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("record", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("hash", name="pk_refused_usage"),
    )


def downgrade() -> None:
    for table in ("refused_usage", "attempts", "usage", "api_keys", "tenants"):
        op.drop_table(table)
