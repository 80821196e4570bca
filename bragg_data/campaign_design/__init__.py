"""Design of a campaign: from structures and an instrument file to the text of a campaign file."""

from bragg_data.campaign_design.design import CampaignDesign, design_campaign, design_each_bank
from bragg_data.campaign_design.options import DesignError, DesignOptions

__all__ = ["CampaignDesign", "DesignError", "DesignOptions", "design_campaign", "design_each_bank"]
