"""The site options of a command as the filter that opens checkpoints."""

from __future__ import annotations

from rankwise.nets.pair import SiteFilter
from rankwise.options.sections import SitesSection


def site_filter(sites: SitesSection) -> SiteFilter:
    return SiteFilter(
        include=sites.include,
        exclude=sites.exclude,
        towers=tuple(sites.towers),
        rename=tuple(sites.rename),
        allow_unmatched=sites.allow_unmatched,
        flatten_conv=sites.flatten_conv,
    )
